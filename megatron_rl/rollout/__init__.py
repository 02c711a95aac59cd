"""From prompts to scored groups: the engine protocol, its implementations, and collection. Never imports ``model``."""
