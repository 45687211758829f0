"""A daemon at mixed load for a long time, with faults: nothing is lost without a word, and nothing piles up."""
