"""A zoo: every model of a collection is pruned, compacted, compared and trained one step, each in its own process."""
