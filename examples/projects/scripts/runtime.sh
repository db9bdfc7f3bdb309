#!/bin/sh
# Installs what the application runs on.
set -e
apt-get update
apt-get install -y --no-install-recommends python3
