"""What there is to train on: folders and dataset files to image records. Headers and names only, no decoding."""
