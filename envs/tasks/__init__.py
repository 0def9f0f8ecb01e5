"""Table-top tasks: what stands on the table, what is asked, what counts as success, and how an expert does it."""
