"""How each functional operation is computed: the reference, and the dispatch between backends."""
