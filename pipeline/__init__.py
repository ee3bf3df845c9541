"""DVC stages: thin modules that read their resolved configuration, call `qwt2` and write outputs."""
