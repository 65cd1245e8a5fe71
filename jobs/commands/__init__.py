"""The `moebeam` command and the notebook function."""
