"""Vectors of many images: written as Parquet shards, searched, grouped by likeness, and probed."""
