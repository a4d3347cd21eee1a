"""The embedded default: starter stories, starter models and the code that builds them."""
