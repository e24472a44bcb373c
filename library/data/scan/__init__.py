"""From folders and dataset files to image records. Reads file names and headers, and decodes masks alone."""
