"""How a layer or block is computed, one file a backend, and the loader of the native library."""
