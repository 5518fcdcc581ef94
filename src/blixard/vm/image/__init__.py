"""Guest images: what they are made of, how they are built, where they are kept."""
