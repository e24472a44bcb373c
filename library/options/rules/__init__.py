"""Rules between flags: the kinds of rules, the tables, and how they are applied."""
