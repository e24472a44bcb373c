"""A base model that is stored quantised under an adapter: which format and layers, the packing, and the error."""
