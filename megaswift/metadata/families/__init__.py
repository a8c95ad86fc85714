"""One declaration per model family; numbers are the defaults of keys that a config.json leaves out."""
