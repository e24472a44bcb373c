"""What the user said, as frozen, typed, checked options. Standard library only, so that --help answers at once."""
