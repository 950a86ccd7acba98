"""Hidden states of the teacher: computed, or read from a cache that is never taken on trust."""
