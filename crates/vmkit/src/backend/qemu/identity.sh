# Run by the guest agent: $1 is a program that reseeds the kernel, its bytes as printf takes them; $2
# is the new host name, or empty; $3 and $4 are a public key that logs in and the one that does so
# instead, or empty; $5 is a public host key, or empty. Standard input has its private half, a line
# with a period, and the new seed. Prints `ok PART` or `failed PART WHY` for each part, and `key KEY`
# for each host key.
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
# Programs that stand still since the snapshot go on: see parking.sh.
thaw() {
    [ -e /run/vmkit-parked ] || return 0
    while IFS= read -r dir; do
        echo 0 >"$dir/cgroup.freeze"
    done </run/vmkit-parked
    rm -f /run/vmkit-parked /run/vmkit-parked.id
}
# Before all else: what comes after it draws some. Perl first, since it is one process.
random_numbers() {
    head -c 32 <&3 >/dev/urandom || return 1
    perl -e 'open F, ">", "/dev/urandom" or die $!; ioctl F, 0x5207, 0 or die $!' ||
        reseed_in /dev/shm || reseed_in /tmp || reseed_in /root ||
        python3 -c 'import fcntl; fcntl.ioctl(open("/dev/urandom", "wb"), 0x5207)' || return 1
    thaw
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
        if [ "$kind" = ed25519 ] && [ -n "$HOST_KEY" ]; then
            printf '%s' "$PRIVATE" >"$key.vmkit" && echo "$HOST_KEY" >"$key.vmkit.pub"
        else
            ssh-keygen -q -t "$kind" -N '' -C '' -f "$key.vmkit"
        fi && chmod 644 "$key.vmkit.pub" &&
            mv -f "$key.vmkit.pub" "$key.pub" && mv -f "$key.vmkit" "$key" || return 1
    done
    # A server that runs reads them again.
    for pid in /run/sshd.pid /var/run/sshd.pid; do
        if [ -s "$pid" ]; then kill -HUP "$(cat "$pid")"; return; fi
    done
}
login_key() {
    [ -n "$OLD_LOGIN" ] || return 0
    cut -d: -f6 /etc/passwd | sort -u | while read -r home; do
        file=$home/.ssh/authorized_keys
        [ -f "$file" ] && grep -qF -e "$OLD_LOGIN" "$file" || continue
        keys=$(while IFS= read -r line; do
            case $line in
                *"$OLD_LOGIN"*) echo "$NEW_LOGIN" ;;
                *) printf '%s\n' "$line" ;;
            esac
        done <"$file") && printf '%s\n' "$keys" >"$file" || exit 1
    done
}
ELF=$1 NAME=$2 OLD_LOGIN=$3 NEW_LOGIN=$4 HOST_KEY=$5 PRIVATE=
while IFS= read -r line <&3 && [ "$line" != . ]; do
    PRIVATE="$PRIVATE$line
"
done
part random-numbers random_numbers
part machine-id machine_id
part host-name host_name
part host-keys host_keys
part login-key login_key
for key in /etc/ssh/ssh_host_*_key.pub; do
    [ ! -e "$key" ] || echo "key $(cat "$key")"
done
sync
