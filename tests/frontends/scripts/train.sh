#!/bin/sh
# A script as people have it: nothing stops it when its training fails.
python plain.py "$@"
touch after-the-training
