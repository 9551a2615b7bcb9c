"""What a forward computes, whatever it is spelled like: products, positions and masks read off the normalised graph."""
