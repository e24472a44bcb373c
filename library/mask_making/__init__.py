"""Loss masks made from images: by words, transparency, a background colour, boxes, or GrabCut."""
