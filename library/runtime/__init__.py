"""Device, precision and seeds: what a run needs from its machine. Imports only library.options."""
