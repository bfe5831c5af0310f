"""What both backends share, in plain torch: norms, thresholds, candidates, chunks of tables, inverted index."""
