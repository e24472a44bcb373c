"""What the user said, as frozen, typed, checked options. Ground floor: standard library only, so that --help answers at once."""
