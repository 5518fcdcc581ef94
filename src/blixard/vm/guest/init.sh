#!/bin/busybox sh
# First process of a guest, from the initrd: brings up devices and the root file system, then becomes the agent.
B=/bin/busybox
die() {
    echo "blixard-init: $*" >/dev/console
    $B poweroff -f
}
has_port() {
    for port in /dev/vport*; do [ -e "$port" ] && return; done
    return 1
}
$B mkdir -p /proc /sys /dev /image /memory /root
$B mount -t proc -o nosuid,nodev,noexec proc /proc
$B mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
$B mount -t devtmpfs -o nosuid devtmpfs /dev
while read -r module; do
    $B insmod "/modules/$module" || die "cannot load $module"
done </modules/order

# Devices appear a moment after their drivers.
tries=0
until [ -e /dev/vda ] && has_port; do
    tries=$((tries + 1))
    [ $tries -lt 3000 ] || die "no disk or no agent port"
    $B usleep 10000
done

# The image stays read-only; what a job writes goes to memory. Nobody becomes root by a program's owner.
$B mount -t ext4 -o ro,noatime,nosuid,nodev /dev/vda /image || die "cannot mount the image"
$B mount -t tmpfs -o mode=0755,size=90% memory /memory
$B mkdir /memory/upper /memory/work
$B mount -t overlay -o nosuid,nodev,lowerdir=/image,upperdir=/memory/upper,workdir=/memory/work root /root || die "cannot mount the overlay"
$B mkdir -p /root/opt/blixard
$B cp -r /guest/lib /root/opt/blixard/lib

$B mkdir -p /dev/shm /dev/pts
$B mount -t tmpfs -o nosuid,nodev,mode=1777 shm /dev/shm
$B mount -t devpts -o nosuid,noexec,gid=5,mode=620,ptmxmode=666 devpts /dev/pts
$B mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /sys/fs/cgroup || die "cannot mount cgroup2"
for directory in proc sys dev; do $B mount --move /$directory /root/$directory; done
$B mount -t tmpfs -o nosuid,nodev,mode=0755 run /root/run
$B mount -t tmpfs -o nosuid,nodev,mode=1777 tmp /root/tmp

$B ip link set lo up
$B hostname guest
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 HOME=/root
cd /root || die "no root directory"
exec $B switch_root -c /dev/console /root /usr/bin/python3 -S -E /opt/blixard/lib/start_agent.py
