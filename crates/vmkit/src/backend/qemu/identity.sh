# Run by the guest agent: $1 is a program that reseeds the kernel, its bytes as printf takes them; $2
# is the new host name, or empty. Standard input has the new seed. Prints `ok PART` or
# `failed PART WHY` for each part, and `key KEY` for each host key.
exec 3<&0 </dev/null
umask 077
part() {
    name=$1; shift
    if said=$("$@" 2>&1); then
        echo "ok $name"
    else
        printf 'failed %s %s\n' "$name" "$(printf '%s' "$said" | tr '\n' ' ')"
    fi
}
# The content of a file comes in; it is there at once, or not at all.
replace() {
    cat >"$1.vmkit" && chmod "$2" "$1.vmkit" && mv -f "$1.vmkit" "$1"
}
reseed_in() {
    [ "$(uname -m)" = x86_64 ] && dir=$(mktemp -d "$1/vmkit.XXXXXX") || return 1
    printf "$ELF" >"$dir/reseed" && chmod 700 "$dir/reseed" && "$dir/reseed"
    code=$?
    rm -rf "$dir"
    return $code
}
# Before all else: what comes after it draws some. Perl first, since it is one process.
random_numbers() {
    head -c 32 <&3 >/dev/urandom || return 1
    perl -e 'open F, ">", "/dev/urandom" or die $!; ioctl F, 0x5207, 0 or die $!' ||
        reseed_in /dev/shm || reseed_in /tmp || reseed_in /root ||
        python3 -c 'import fcntl; fcntl.ioctl(open("/dev/urandom", "wb"), 0x5207)' || return 1
    seed=/var/lib/systemd/random-seed
    [ ! -e $seed ] || head -c 512 /dev/urandom | replace $seed 600
}
machine_id() {
    [ -e /etc/machine-id ] || return 0
    id=$(tr -d - </proc/sys/kernel/random/uuid) && echo "$id" | replace /etc/machine-id 444 || return 1
    dbus=/var/lib/dbus/machine-id
    [ ! -f $dbus ] || [ -L $dbus ] || echo "$id" | replace $dbus 444
}
host_name() {
    [ -n "$NAME" ] || return 0
    old=$(cat /proc/sys/kernel/hostname | sed 's/\./\\./g') && echo "$NAME" | replace /etc/hostname 644 &&
        echo "$NAME" >/proc/sys/kernel/hostname || return 1
    [ -e /etc/hosts ] && [ -n "$old" ] || return 0
    hosts=$(sed "s/\([[:space:]]\)$old\([[:space:].]\|\$\)/\1$NAME\2/g" /etc/hosts) &&
        printf '%s\n' "$hosts" | replace /etc/hosts 644
}
host_keys() {
    for key in /etc/ssh/ssh_host_*_key; do
        [ -e "$key" ] || continue
        kind=${key#/etc/ssh/ssh_host_}; kind=${kind%_key}
        rm -f "$key.vmkit" "$key.vmkit.pub"
        ssh-keygen -q -t "$kind" -N '' -C '' -f "$key.vmkit" && chmod 644 "$key.vmkit.pub" &&
            mv -f "$key.vmkit.pub" "$key.pub" && mv -f "$key.vmkit" "$key" || return 1
    done
    # A server that runs reads them again.
    for pid in /run/sshd.pid /var/run/sshd.pid; do
        if [ -s "$pid" ]; then kill -HUP "$(cat "$pid")"; return; fi
    done
}
ELF=$1 NAME=$2
part random-numbers random_numbers
part machine-id machine_id
part host-name host_name
part host-keys host_keys
for key in /etc/ssh/ssh_host_*_key.pub; do
    [ ! -e "$key" ] || echo "key $(cat "$key")"
done
sync
