"""The paper's tables on a user's own copies of its models and data, with the authors' numbers next to the results."""
