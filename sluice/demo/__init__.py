"""The whole pipeline on one machine: embedded brokers, supervised processes and the `sluice demo` command.

Nothing here is meant for production: the brokers keep their data in memory and listen on the loopback interface only.
"""
