"""The loop that runs batches on the runtime and hands their results to the executions."""
