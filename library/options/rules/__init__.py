"""Rules between flags: their kinds, the tables of rules, and their application."""
