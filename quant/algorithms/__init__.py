"""Better roundings: arrays in, arrays out; no files, no models."""
