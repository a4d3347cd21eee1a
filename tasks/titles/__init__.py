"""Plain Python about titles: stories, prompts, filters, rewards, statistics, configuration and errors."""
