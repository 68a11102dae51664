"""Node-count studies: one recipe, some steps on each of several node counts, and how it scaled."""
