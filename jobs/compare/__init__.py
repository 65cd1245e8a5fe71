"""`moebeam compare`: two runs side by side, row by row and in figures."""
