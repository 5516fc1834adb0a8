"""Floor 3: the CELLxGENE Census, and the layouts that others keep tokenized cells in."""
