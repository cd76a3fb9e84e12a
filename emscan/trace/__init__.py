"""One run under a dispatch mode: operator calls, dataflow between them, and who holds the weights."""
