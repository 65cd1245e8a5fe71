"""moebeam against its peers: programs that measure, each contender in the same run on the same rows."""
