"""Training programs: `sft`. Each is flat, readable top to bottom, importable, with a `main(config)`."""
