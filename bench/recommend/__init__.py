"""From limits to the configuration to deploy: a decision over the records of runs, which measures nothing by itself."""
