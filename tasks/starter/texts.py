"""The sentences and titles that starter stories are told in.

A kind of story has `facts` (groups of wordings; the first group is the lead, each of the `core` groups is
always told), `titles` by style, `flips` (a word and its opposite, for titles that claim the wrong
direction) and the units of its figures. Words in braces are slots that `world.py` fills.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of story; see the module's docstring."""

    popularity: float
    """What the kind adds to the expected log score."""
    topic: str
    units: tuple[str, str, str]
    """Patterns of the figures {n}, {m} and {k}: '#' is replaced by a number."""
    core: tuple[tuple[str, ...], ...]
    more: tuple[tuple[str, ...], ...]
    titles: dict[str, tuple[str, ...]]
    flips: tuple[tuple[str, str], ...]


KINDS: dict[str, Kind] = {
    "release": Kind(
        0.15,
        "build tools",
        ("# percent", "# contributors", "# bugs"),
        (
            (
                "{co} has released a new version of {pr}, its build tool.",
                "A new version of {pr}, the build tool from {co}, came out on {da}.",
                "The team at {co} shipped the next version of {pr} on {da}.",
            ),
            (
                "It cuts build times by {n}.",
                "Builds take {n} less time than before.",
                "In the company's own tests build times fell by {n}.",
            ),
            (
                "The gain comes from {why}.",
                "Most of the speed comes from {why}.",
                "{pe} credits {why} for the gain.",
            ),
            (
                "{pe}, who leads the project, wrote the announcement.",
                "The release was led by {pe}.",
                "{pe} has led the project for two years.",
            ),
        ),
        (
            ("The release closes {k}.", "It also fixes {k}.", "Along the way {k} were fixed."),
            ("{m} took part.", "The notes thank {m}.", "Patches came from {m}."),
            ("Users in {ci} tested the beta.", "The beta was tried first at an office in {ci}."),
            ("Old configuration files still work.", "No change to existing projects is needed."),
        ),
        {
            "figure": ("{co} cuts {pr} build times by {n}", "{pr} builds are now {n} faster to finish"),
            "cause": ("{co} cuts {pr} build times by {n} with {why}", "{pr} build times down {n} thanks to {why}"),
            "plain": ("{co} releases new version of {pr}", "New version of {pr} is out", "{co} ships faster {pr}"),
            "how": ("How {co} made {pr} builds faster", "How {why} made {pr} faster"),
        },
        (("cuts", "raises"), ("down", "up"), ("faster", "slower")),
    ),
    "funding": Kind(
        -0.25,
        "startups",
        ("$# million", "# employees", "# customers"),
        (
            (
                "{co} has raised {n} to expand {pr}.",
                "Investors have put {n} into {co}, the maker of {pr}.",
                "The startup {co} closed a round of {n} on {da}.",
            ),
            ("The company sells {pr}.", "Its main product is {pr}.", "{co} is known for {pr}."),
            ("{rv} led the round.", "The round was led by {rv}.", "{rv} was the largest investor."),
            (
                "The money will go into {why}.",
                "{pe}, the founder, wants to spend it on {why}.",
                "It plans to use the funds for {why}.",
            ),
            ("{pe} founded the company in {ci}.", "{pe} started it in {ci} six years ago."),
        ),
        (
            ("The firm has {m}.", "Today {m} work there.", "It counts {m}."),
            ("It serves {k}.", "{k} pay for the product.", "There are {k} so far."),
            ("The company isn't profitable yet.", "Profit is expected next year."),
            ("The deal was signed on {da}.", "Papers were signed on {da}."),
        ),
        {
            "figure": ("{co} raises {n}", "{pr} maker {co} raises {n}"),
            "cause": ("{co} raises {n} from {rv} for {why}", "{co} raises {n} to invest in {why}"),
            "plain": ("{co} raises new round led by {rv}", "{rv} invests in {co}", "{co} closes funding round"),
            "how": ("How {pe} built {co}", "How {co} plans to use its new funding"),
        },
        (("raises", "returns"), ("invests in", "pulls out of")),
    ),
    "outage": Kind(
        0.3,
        "cloud outages",
        ("# hours", "# thousand users", "# engineers"),
        (
            (
                "{pr}, the hosting service of {co}, was down for {n} on {da}.",
                "An outage took {pr} offline for {n}.",
                "For {n} nobody could reach {pr}, which {co} runs.",
            ),
            ("{co} operates the service.", "The service belongs to {co}.", "{co} apologised on its status page."),
            ("The cause was {why}.", "Engineers traced it to {why}.", "{co} blames {why}."),
            ("{pe}, head of operations, wrote the report.", "A report by {pe} followed.", "{pe} explained the events."),
        ),
        (
            ("About {m} were affected.", "It hit {m}.", "{m} noticed."),
            ("{k} worked on the repair.", "A group of {k} repaired it.", "The fix took {k}."),
            ("The first alarm came from {ci}.", "Customers in {ci} were hit first."),
            ("No data was lost.", "All data survived."),
        ),
        {
            "figure": ("{pr} was down for {n}", "{co} takes {pr} offline for {n}"),
            "cause": ("{pr} was down for {n} because of {why}", "How {why} took {pr} down for {n}"),
            "plain": ("{pr} outage report", "{co} explains {pr} outage", "{pr} went down on {da}"),
            "how": ("How {why} broke {pr}", "How {co} brought {pr} back"),
        },
        (("down", "up"), ("offline", "online")),
    ),
    "acquisition": Kind(
        0.05,
        "mergers",
        ("$# million", "# employees", "# patents"),
        (
            (
                "{co} is buying {rv} for {n}.",
                "{rv} has agreed to be bought by {co} for {n}.",
                "{co} said on {da} that it will pay {n} for {rv}.",
            ),
            ("{rv} makes {pr}.", "The target is best known for {pr}.", "{pr} is the product it wants."),
            ("The buyer is after {why}.", "{co} says it needs {why}.", "Behind the deal is {why}."),
            ("{pe} runs the buyer.", "{pe}, chief executive of {co}, announced it.", "{pe} of {co} led the talks."),
        ),
        (
            ("All {m} will stay.", "The {m} of the target keep their jobs.", "It brings {m}."),
            ("The deal includes {k}.", "{k} change hands.", "{k} are part of it."),
            ("Regulators in {ci} must agree.", "It needs approval in {ci}."),
            ("The deal should close on {da}.", "Both boards have agreed."),
        ),
        {
            "figure": ("{co} buys {rv} for {n}", "{co} pays {n} for {pr} maker {rv}"),
            "cause": ("{co} buys {rv} for {n} to get {why}", "{co} pays {n} for {rv} and {why}"),
            "plain": ("{co} acquires {rv}", "{co} to buy {pr} maker {rv}", "{rv} acquired by {co}"),
            "how": ("How {co} came to buy {rv}", "How {pe} won {rv}"),
        },
        (("buys", "sells"), ("acquires", "sues"), ("buy", "sue")),
    ),
    "breach": Kind(
        0.35,
        "security",
        ("# million records", "# days", "# servers"),
        (
            (
                "{co} has leaked {n} of its customers.",
                "A breach at {co} exposed {n}.",
                "{n} from {co} were found in the open on {da}.",
            ),
            ("The data came from {pr}.", "{pr} was the system at fault.", "They were stored in {pr}."),
            ("{pe}, a security researcher, found it.", "It was discovered by {pe}.", "{pe} reported the leak."),
            ("It was caused by {why}.", "The reason was {why}.", "{pe} points to {why}."),
        ),
        (
            ("The data lay open for {m}.", "It took {m} to close the hole.", "It went unnoticed for {m}."),
            ("{k} were involved.", "The company took {k} offline.", "It concerns {k}."),
            ("Police in {ci} are investigating.", "An office in {ci} has been told."),
            ("Passwords were not part of it.", "Payment data was not included."),
        ),
        {
            "figure": ("{co} leaks {n}", "{n} exposed in {co} breach"),
            "cause": ("{co} leaks {n} through {why}", "{n} exposed at {co} due to {why}"),
            "plain": ("{co} suffers data breach", "Data breach at {co}", "{pr} leaked customer data"),
            "how": ("How {pe} found the {co} leak", "How {why} exposed {pr}"),
        },
        (("leaks", "recovers"), ("exposed", "saved"), ("leaked", "protected")),
    ),
    "research": Kind(
        0.1,
        "machine learning",
        ("# percent", "# machines", "# papers"),
        (
            (
                "Researchers at {co} have cut the memory use of {pr} by {n}.",
                "A paper from {co} shows how {pr} can run with {n} less memory.",
                "{pr}, a language model, now needs {n} less memory, says {co}.",
            ),
            ("The method relies on {why}.", "At its heart is {why}.", "It works through {why}."),
            ("{pe} is the first author.", "The paper was written by {pe}.", "{pe} presented the result."),
        ),
        (
            ("It was tested on {m}.", "The tests ran on {m}.", "{m} were used."),
            ("The authors compare it with {k}.", "It builds on {k}.", "{k} are cited."),
            ("The talk was given in {ci}.", "A conference in {ci} accepted it."),
            ("Accuracy stays the same.", "No accuracy is lost."),
            ("Code is available.", "The code can be downloaded.", "Reviewers praised the clear writing."),
        ),
        {
            "figure": ("{co} cuts memory use of {pr} by {n}", "{pr} now needs {n} less memory"),
            "cause": ("{pr} needs {n} less memory with {why}", "{co} cuts {pr} memory by {n} using {why}"),
            "plain": ("{co} paper on {pr}", "Running {pr} with less memory", "New paper from {co} on memory use"),
            "how": ("How {co} saves memory with {why}", "How {co} shrank {pr}"),
        },
        (("cuts", "doubles"), ("less", "more")),
    ),
    "rewrite": Kind(
        0.25,
        "programming languages",
        ("# ms", "# months", "# services"),
        (
            (
                "{co} has rewritten {pr} in {te}.",
                "{pr}, the payment system of {co}, is now written in {te}.",
                "After a long project {co} moved {pr} to {te}.",
            ),
            (
                "Response time fell to {n}.",
                "A request now takes {n}.",
                "The new system answers within {n}.",
            ),
            ("The main reason was {why}.", "{pe} names {why} as the reason.", "It was done because of {why}."),
            ("{pe} led the rewrite.", "The work was led by {pe}.", "{pe} tells the story in a long post."),
        ),
        (
            ("The work took {m}.", "It lasted {m}.", "{m} went into it."),
            ("{k} were replaced.", "It replaces {k}.", "In all {k} were moved."),
            ("The team sits in {ci}.", "Most of the team works from {ci}."),
            ("Tests were written first.", "The old code ran beside the new one for a while."),
        ),
        {
            "figure": ("{co} rewrites {pr} in {te} and gets to {n}", "{pr} in {te} answers in {n}"),
            "cause": ("{co} moves {pr} to {te} over {why}, gets {n}", "{why} made {co} rewrite {pr} in {te}, now {n}"),
            "plain": ("{co} rewrites {pr} in {te}", "Moving {pr} to {te}", "{pr} is now written in {te}"),
            "how": ("How {co} moved {pr} to {te}", "How {pe} rewrote {pr}"),
        },
        (("rewrites", "deletes"), ("moves", "sells")),
    ),
    "project": Kind(
        0.0,
        "side projects",
        ("# lines", "# weekends", "# users"),
        (
            (
                "{pe} has written {pr}, a small tool in {te}.",
                "{pr} is a new tool by {pe}, written in {te}.",
                "In {ci} {pe} built {pr} with {te}.",
            ),
            ("The whole program has {n}.", "It fits into {n}.", "The source is just {n} long."),
            ("It is made for {why}.", "Its purpose is {why}.", "{pe} needed it for {why}."),
            ("{pe} works at {co} by day.", "By day {pe} is employed by {co}.", "{co} employs {pe} but doesn't own it."),
        ),
        (
            ("It took {m}.", "The author spent {m} on it.", "{m} were enough."),
            ("So far it has {k}.", "{k} have tried it.", "There are {k} already."),
            ("It runs on old laptops.", "No installation is needed."),
            ("Friends in {ci} gave advice.", "It was first shown at a meeting in {ci}."),
        ),
        {
            "figure": ("Show HN: {pr}, a {te} tool in {n}", "{pr} is a {te} tool in just {n}"),
            "cause": ("Show HN: {pr}, {n} of {te} for {why}", "{pr} does {why} in {n} of {te}"),
            "plain": ("Show HN: {pr}", "{pr}, a small tool in {te}", "{pe} releases {pr}"),
            "how": ("How {pe} built {pr} in {te}", "How I use {pr} for {why}"),
        },
        (("small", "huge"), ("releases", "abandons")),
    ),
    "shutdown": Kind(
        0.1,
        "online services",
        ("# thousand users", "# years", "# employees"),
        (
            (
                "{co} will shut down {pr} on {da}.",
                "{pr} closes on {da}, its owner {co} says.",
                "The end of {pr} is near: {co} turns it off on {da}.",
            ),
            ("It still has {n}.", "{n} have to look for something else.", "The service counts {n}."),
            ("The company names {why} as the reason.", "Behind it is {why}.", "{pe} explains it with {why}."),
            ("{pe} signed the letter.", "A letter by {pe} went out.", "{pe} thanked everyone."),
        ),
        (
            ("The service ran for {m}.", "It lived for {m}.", "After {m} it is over."),
            ("{k} move to other teams.", "The {k} stay with the company.", "It had {k}."),
            ("An archive in {ci} keeps a copy.", "A library in {ci} will keep the pages."),
            ("Data can be exported.", "There is an export button.", "Refunds are promised."),
        ),
        {
            "figure": ("{co} shuts down {pr} with {n}", "{pr} closes on {da}, leaving {n}"),
            "cause": ("{co} shuts down {pr} with {n} over {why}", "{pr} ends over {why}, {n} affected"),
            "plain": ("{co} shuts down {pr}", "{pr} is closing on {da}", "The end of {pr}"),
            "how": ("How {pr} came to its end", "How {why} ended {pr}"),
        },
        (
            ("shuts down", "relaunches"),
            ("closing", "opening"),
            ("closes", "opens"),
            ("end", "return"),
            ("ends", "returns"),
        ),
    ),
    "fine": Kind(
        0.05,
        "regulation",
        ("$# million", "# complaints", "# months"),
        (
            (
                "Regulators in {ci} have fined {co} {n}.",
                "{co} has to pay a fine of {n}.",
                "A court in {ci} ordered {co} to pay {n} on {da}.",
            ),
            ("The case concerns {pr}.", "It is about {pr}.", "At issue is {pr}."),
            ("The company was found guilty of {why}.", "The charge was {why}.", "{co} had been accused of {why}."),
            ("{pe} spoke for the regulator.", "The ruling was read by {pe}.", "{pe} brought the case."),
        ),
        (
            ("There had been {m}.", "It began with {m}.", "{m} had come in."),
            ("The case took {k}.", "It lasted {k}.", "{k} passed before the ruling."),
            ("The company will appeal.", "An appeal is possible."),
            ("Shares fell a little.", "The market hardly moved."),
        ),
        {
            "figure": ("{co} fined {n}", "{co} fined {n} over {pr}"),
            "cause": ("{co} fined {n} for {why}", "{co} must pay {n} for {why} in {pr}"),
            "plain": ("{co} fined over {pr}", "{ci} regulators fine {co}", "{co} loses case over {pr}"),
            "how": ("How {pe} won against {co}", "How {pr} got {co} fined"),
        },
        (("fined", "cleared"), ("loses", "wins"), ("won", "lost")),
    ),
    "hardware": Kind(
        0.2,
        "hardware",
        ("# cores", "# watts", "# dollars"),
        (
            (
                "{co} has announced {pr}, a chip with {n}.",
                "{pr} is a new processor by {co} with {n}.",
                "With {pr} the chip maker {co} offers {n} on one die.",
            ),
            ("It is aimed at {why}.", "The maker has {why} in mind.", "{pe} designed it for {why}."),
            ("{pe} is its architect.", "The design is by {pe}.", "{pe} showed it on stage in {ci}."),
            ("It costs {k}.", "The price is {k}.", "It will sell for {k}."),
        ),
        (
            ("It draws {m}.", "Under load it takes {m}.", "The chip needs {m}."),
            ("Sales begin on {da}.", "It ships from {da}.", "Shops get it on {da}."),
            ("It is made in {ci}.", "A factory in {ci} makes it."),
            ("Old boards can be used.", "It needs a new board."),
            ("Drivers for Linux exist.", "The manuals are public."),
        ),
        {
            "figure": ("{co} announces {pr} with {n}", "{pr} chip has {n} and costs {k}"),
            "cause": ("{co} {pr} brings {n} to {why} for {k}", "{pr} has {n} for {why} at {k}"),
            "plain": ("{co} announces {pr}", "{pr}, a new chip by {co}", "{co} shows new chip"),
            "how": ("How {pe} designed {pr}", "How {co} built {pr}"),
        },
        (("announces", "cancels"), ("new", "last")),
    ),
    "layoffs": Kind(
        -0.05,
        "jobs",
        ("# jobs", "# percent", "# offices"),
        (
            (
                "{co} is cutting {n}.",
                "{n} will go at {co}.",
                "On {da} {co} said it will cut {n}.",
            ),
            ("Most of them belong to {pr}.", "The {pr} team is hit hardest.", "{pr} loses the most people."),
            ("{pe}, the chief executive, blames {why}.", "The reason given is {why}.", "{co} points to {why}."),
            ("{pe} wrote to the staff.", "The news came in a mail by {pe}.", "{pe} took questions."),
        ),
        (
            ("That is {m} of the staff.", "It means {m} of all people.", "{m} of the company is affected."),
            ("{k} will close.", "The company gives up {k}.", "It also closes {k}."),
            ("The office in {ci} stays.", "Staff in {ci} are not affected."),
            ("Those who go get three months of pay.", "Everyone gets help in finding work."),
        ),
        {
            "figure": ("{co} cuts {n}", "{co} cuts {n} in {pr} team"),
            "cause": ("{co} cuts {n} over {why}", "{co} blames {why} for loss of {n}"),
            "plain": ("Layoffs at {co}", "{co} cuts jobs in {pr} team", "{co} is laying people off"),
            "how": ("How {co} told its staff", "How {why} led to layoffs at {co}"),
        },
        (("cuts", "adds"), ("loss", "gain")),
    ),
}

COMMON_TITLES: dict[str, tuple[str, ...]] = {
    "person": ("{pe} on {pr}", "{pe} talks about {co}", "A note by {pe} on {pr}"),
    "question": ("What is happening with {pr}?", "Is {co} on the right track?", "Should we care about {pr}?"),
    "vague": ("Some thoughts on {topic}", "News about {co}", "Something about {topic}", "On {pr}"),
    "clickbait": (
        "You will not believe this about {co}",
        "This changes everything we know about {pr}",
        "Everyone is talking about {co}",
    ),
}

INVENTED = (
    " and open sources it",
    " after lawsuit by {x}",
    ", founder resigns",
    " and hires 200 people",
    " with help from {x}",
    ", says {y}",
    " in {z}",
    " for the second time",
    " and moves to {z}",
    ", {x} follows",
)
"""Claims that no body makes; {x} is a company, {y} a person and {z} a city that the body does not name."""

DISTRACTORS = (
    "{ox}, a rival, reported {fig} last year.",
    "By comparison {ox} had {fig}.",
    "Two years ago {ox} announced {fig}.",
    "{oy} of {ox} calls the news interesting and mentions {fig}.",
    "For {op}, a product of {ox}, the number was {fig}.",
    "{ox} and its tool {op} are not part of this.",
    "Analysts had expected {fig}.",
    "The weather in {oz} was fine that day.",
    "{oy}, a former employee, now lives in {oz}.",
    "A podcast with {oy} about {op} is planned.",
    "Some readers asked about {op}.",
    "{ox} declined to comment.",
    "The topic of {topic} has come up often this year.",
    "Readers who follow {topic} will know the background.",
    "Others in the field are watching.",
    "The full text is on the company's site.",
    "More details will follow.",
)
