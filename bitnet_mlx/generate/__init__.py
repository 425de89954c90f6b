"""From a prompt to text: engines, sampling, streaming."""
