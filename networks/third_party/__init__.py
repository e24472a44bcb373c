"""Third-party network modules (LyCORIS, a user's own file), used unmodified."""
