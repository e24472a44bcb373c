"""Device, precision, memory, processes and seeds. Imports only library.options."""
