#!/bin/sh
# The first process of the guest: sets up what a shell needs, then runs one command a line from its console and answers with
# what the command printed and a last line "@@@ STATUS". Root is the host's, read-only; what is written goes to memory.
stty raw -echo
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH HOME=/run
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /mnt
# nbdkit reserves 192 MiB that it never touches; a guest with hardly more memory may refuse that and kill it.
echo 1 >/proc/sys/vm/overcommit_memory
insmod "/usr/lib/uml/modules/$(uname -r)/kernel/drivers/block/nbd.ko"
ip link set lo up
ip addr add "$guest_address" dev vec0
ip link set vec0 up
echo "@@@ 0"
while read -r line; do
    eval "$line" </dev/null >/run/output 2>&1
    status=$?
    cat /run/output
    echo
    echo "@@@ $status"
done
