"""The words that starter stories are filled with: reasons by kind of story, places and the parts of names."""

from __future__ import annotations

REASONS: dict[str, tuple[str, ...]] = {
    "release": ("a new scheduler", "smarter caching", "parallel parsing", "incremental linking", "lazy loading",
                "a rewritten parser", "better compression", "fewer disk reads"),
    "funding": ("research in robotics", "a larger sales team", "offices in Asia", "safer storage", "faster delivery",
                "cheaper chips", "better support", "a mobile app"),
    "outage": ("a faulty switch", "an expired certificate", "a full disk", "a bad software update", "a cut fiber cable",
               "a wrong default", "a memory leak", "a typing error"),
    "acquisition": ("its map data", "its search index", "its engineers", "its customer list", "its office tools",
                    "its data centers", "its billing system", "its video library"),
    "breach": ("an open database", "a stolen laptop", "weak passwords", "a test account", "missing encryption",
               "a leaked key", "an old plugin", "a shared login"),
    "research": ("low precision numbers", "shared weights", "sparse attention", "smaller vocabularies",
                 "layer skipping", "better rounding", "cached keys", "early stopping"),
    "rewrite": ("slow garbage collection", "memory leaks", "long compile times", "too many dependencies",
                "rising cloud costs", "random crashes", "missing types", "slow tests"),
    "project": ("reading mail offline", "backing up photos", "tracking expenses", "searching old notes",
                "drawing maps", "naming colors", "sorting books", "planning trips"),
    "shutdown": ("falling demand", "rising cloud costs", "new competitors", "a failed merger", "too much spam",
                 "old code", "legal trouble", "a lack of staff"),
    "fine": ("hidden fees", "unfair contracts", "selling user data", "misleading ads", "fake reviews",
             "late refunds", "price fixing", "ignoring warnings"),
    "hardware": ("data centers", "home servers", "weather models", "video editing", "small robots",
                 "network routers", "game consoles", "image search"),
    "layoffs": ("falling demand", "high interest rates", "a failed merger", "new competitors", "slow sales",
                "automation", "rising rents", "a lost contract"),
}  # fmt: skip
LANGUAGES = ("Rust", "Go", "Zig", "Python", "Elixir", "Kotlin", "OCaml", "Haskell", "Swift", "Lua", "Julia", "Erlang")
CITIES = (
    "Berlin", "Oslo", "Lisbon", "Austin", "Toronto", "Nairobi", "Seoul", "Osaka", "Lyon", "Dublin", "Zurich", "Vienna",
    "Porto", "Boston", "Denver", "Lima", "Quito", "Hanoi", "Pune", "Cairo", "Riga", "Turin", "Bergen", "Leeds",
)  # fmt: skip
FIRST_NAMES = (
    "Mira", "Jonas", "Ana", "Tom", "Leila", "Omar", "Ivy", "Hugo", "Nina", "Pavel", "Rosa", "Kenji", "Sara", "Liam",
    "Eva", "Diego", "Maya", "Felix", "Aisha", "Oscar", "Clara", "Ravi", "Helen", "Bruno", "Yuki", "Greta", "Sam",
    "Ines", "Karl", "Dana", "Igor", "Alma", "Noel", "Vera", "Luca", "Mei",
)  # fmt: skip
LAST_NAMES = (
    "Holt", "Berger", "Silva", "Okafor", "Tanaka", "Novak", "Reyes", "Lind", "Moreau", "Kaya", "Dunn", "Petrov",
    "Walsh", "Ferrari", "Nguyen", "Adler", "Costa", "Haas", "Iyer", "Jansen", "Kowal", "Lopez", "Mensah", "Nilsen",
    "Ortiz", "Park", "Quinn", "Rossi", "Sato", "Trent", "Ueda", "Vance", "Weiss", "Young", "Zhou", "Brandt",
)  # fmt: skip
COMPANY_STARTS = (
    "Nor", "Kel", "Bright", "Data", "Cloud", "Blue", "Iron", "Sol", "Vel", "Tor", "Quant", "Micro", "Open", "Hyper",
    "Luma", "Zen", "Pixel", "Red", "North", "Silver", "Terra", "Vector", "Wave", "Code", "Deep", "Clear", "Fire",
    "Green", "Grid", "Helio",
)  # fmt: skip
COMPANY_ENDS = (
    "vik", "ton", "wise", "forge", "base", "works", "soft", "lab", "ware", "point", "stack", "nova", "core", "field",
    "bridge", "line", "mind", "gate", "sys", "dyne", "path", "light", "port", "stone",
)  # fmt: skip
PRODUCT_STARTS = (
    "Kes", "Mar", "Al", "Or", "Pin", "Sky", "Tan", "Ul", "Vio", "Wil", "Zeph", "Cor", "Dar", "El", "Fal", "Gal", "Har",
    "Jas", "Lyn", "Mel", "Oak", "Pol", "Quill", "Rav", "Sand", "Tul",
)  # fmt: skip
PRODUCT_ENDS = (
    "trel", "ble", "ion", "bit", "der", "fin", "gon", "let", "mere", "nest", "per", "row", "sen", "tis", "ven", "wick",
    "yx", "zar", "dle", "ster",
)  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
