"""What a Flink cluster needs to run moebeam: worker pools, a local cluster, Maven, Flink and Kubernetes files."""
