#!/bin/sh
# Runs outside the new root file system, with its path as $1, once all packages are installed.
set -eu
root=$1

# The machine's own identity is made at first boot.
rm -f "$root"/etc/ssh/ssh_host_*
: >"$root/etc/machine-id"
echo debian >"$root/etc/hostname"
echo 'LABEL=root / ext4 defaults 0 0' >"$root/etc/fstab"
ln -sf ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"

chroot "$root" systemctl enable systemd-networkd
# Nobody waits for these, and under emulation they cost seconds.
chroot "$root" systemctl mask \
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer \
    getty@tty1.service systemd-pstore.service systemd-update-utmp.service cloud-init-hotplugd.socket
