#!/bin/sh
# Turns the tarball $1 into the raw ext4 image $2/disk.raw, and takes kernel and initrd out of it.
# It runs as root, or under fakeroot: owners and modes end up in the image either way, and nothing is mounted.
set -eu
tarball=$1
work=$2
root=$work/root

mkdir "$root"
# The guest has a devtmpfs; only root could make the nodes here.
tar --extract --file "$tarball" --directory "$root" --exclude './dev/*'
for file in vmlinuz initrd; do
    cat "$root"/boot/"$file"*-* >"$work/$file"
    rm "$root"/boot/"$file"*
done
mke2fs -q -t ext4 -L root -E root_owner=0:0 -d "$root" "$work/disk.raw" "$3"
rm -r "$root"
