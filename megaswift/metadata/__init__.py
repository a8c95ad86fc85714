"""Facts about models, read from config.json and the tokenizer files; no torch, no transformers."""
