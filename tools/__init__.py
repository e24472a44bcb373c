"""Programs beside the training. Each: options -> library -> exit."""
