#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Storage target mode in the initrd: boot with "rd.systemd.unit=storage-target-mode.target ip=link-local".
# No root= is needed. The target pulls in none of dracut's own services (they hang off initrd.target), so nothing
# waits for a root device and nothing complains that there is none.
#
# shellcheck disable=SC2154  # dracut sets the variables that nothing here does.

# The directory that holds storagetm.service, searched in the order in which systemd would.
storagetm_unit_dir() {
    local dir

    for dir in /etc/systemd/system /usr/local/lib/systemd/system "$systemdsystemunitdir"; do
        if [[ -e $dir/storagetm.service ]]; then
            echo "$dir"
            return 0
        fi
    done
    return 1
}

# The program, at the path that the unit runs it by.
storagetm_program() {
    sed -n 's/^ExecStart=[-@:+!]*\([^[:space:]]*\).*/\1/p;T;q' "$(storagetm_unit_dir)/storagetm.service"
}

check() {
    [[ $mount_needs ]] && return 1
    require_binaries /usr/bin/python3 "$systemdutildir"/systemd-networkd "$systemdutildir"/systemd-network-generator \
        || return 1
    if ! /usr/bin/python3 -IS -c 'import ctypes' 2> /dev/null; then
        derror "storagetm: Python's module 'ctypes' is missing; install the package 'python3', of which" \
            "'python3-minimal' is only a part"
        return 1
    fi
    if ! storagetm_unit_dir > /dev/null || ! [[ -x $(storagetm_program) ]]; then
        derror "storagetm: the unit or the program isn't installed"
        return 1
    fi

    # The drivers for any disk and any network adapter make an image much larger: only where it is asked for.
    return 255
}

depends() {
    # Plymouth's module includes itself where Plymouth is installed. dracut's module for networkd isn't named, since
    # it enables networkd, and a normal boot with the same image would find its interfaces configured.
    echo kernel-modules systemd-initrd udev-rules
}

installkernel() {
    local module

    # A machine in this mode is often one that doesn't work, with a disk moved over from another, a USB adapter
    # instead of the network card, a Thunderbolt cable. What is plugged in now says little about that, so even an
    # image for this host gets every driver.
    # shellcheck disable=SC2046  # One word is one module.
    hostonly='' instmods \
        $("$(storagetm_program)" --modules) \
        =drivers/ata =drivers/message =drivers/mmc =drivers/nvme/host =drivers/scsi =drivers/ufs =drivers/usb/storage \
        floppy mtip32xx sd_mod sr_mod virtio_blk virtio_scsi vmd xen-blkfront \
        =drivers/firewire =drivers/hv =drivers/pci/controller =drivers/thunderbolt =drivers/usb/host =drivers/virtio \
        =drivers/net/ethernet =drivers/net/hyperv =drivers/net/mdio =drivers/net/phy =drivers/net/usb \
        =drivers/net/vmxnet3 =drivers/net/thunderbolt thunderbolt-net virtio_net xen-netfront \
        =drivers/usb/gadget/udc =drivers/usb/cdns3 =drivers/usb/chipidea =drivers/usb/dwc2 =drivers/usb/dwc3 \
        =drivers/usb/musb =drivers/usb/roles \
        af_packet inet_diag ipv6 tcp_diag \
        atkbd hid-generic i8042 usbhid
    # Credentials from firmware, which systemd looks for at its start.
    hostonly='' instmods dmi-sysfs qemu_fw_cfg
    # For systemd-pcrphase-storage-target-mode.service; most kernels have them built in.
    hostonly='' instmods '=drivers/char/tpm'
    # For vlan=, bond= and bridge= on the kernel command line.
    hostonly='' instmods 8021q bonding bridge

    # dracut leaves out what there isn't, and an image that can't do what it is for is only noticed when it is needed.
    for module in nvmet-tcp dm-mod dm-flakey; do
        if ! storagetm_has_module $module; then
            dfatal "storagetm: the kernel $kernel has no module '$module', without which no disk can be exported" \
                "read-only; install the package with the rest of its modules, or name another kernel with --kver"
            exit 1
        fi
    done
    if ! storagetm_has_module loop || ! storagetm_has_module dm-snapshot; then
        dwarn "storagetm: the kernel $kernel has no module 'loop' or no 'dm-snapshot': with this image, disks can't be" \
            "exported as snapshots"
    fi
}

# Whether a kernel module is in the image, or is part of the kernel. Dashes and underscores in names are the same.
storagetm_has_module() {
    local name=${1//[-_]/[-_]}

    [[ $(find "$initdir" -path "*/modules/$kernel/*" -name "$name.ko*") ]] \
        || grep -qs "/$name\.ko" "$srcmods/modules.builtin"
}

install() {
    local files more program rules unit_dir unit

    unit_dir=$(storagetm_unit_dir)
    program=$(storagetm_program)

    inst_multiple "$unit_dir"/storage-target-mode.target "$unit_dir"/storagetm.service \
        "$unit_dir"/storagetm-failure.service sh sleep systemctl

    # Python isn't installed whole: python-initrd puts the program and the modules that it can come to import into
    # the image, both as bytecode for the interpreter they go with, and prints what is left for dracut to install.
    # dracut would go on without any of it, to an image that can't do the one thing it is for.
    inst_multiple /usr/bin/python3
    # Encrypted NBD, if dracut's configuration has storagetm_nbd_tls=yes, needs OpenSSL.
    more=''
    if [[ ${storagetm_nbd_tls-no} == yes ]]; then
        if ! /usr/bin/python3 -IS -c 'import ssl; assert ssl.HAS_PSK and ssl.SSLContext.set_psk_server_callback' \
            2> /dev/null; then
            dfatal "storagetm: this Python can't encrypt NBD (3.13 and later can); take storagetm_nbd_tls=yes out of" \
                "dracut's configuration"
            exit 1
        fi
        more=ssl
    fi
    # shellcheck disable=SC2086  # These paths are Python's own and have no spaces.
    if ! files=$(/usr/bin/python3 -IS -X no_debug_ranges "$moddir"/python-initrd "$program" "$initdir" $more) \
        || ! inst_multiple $files; then
        dfatal "storagetm: could not install the program and the part of Python that it needs"
        exit 1
    fi

    # What the screen calls this system. In the os-release of an image, dracut may have its own name only.
    if [[ -e $dracutsysrootdir/etc/os-release ]]; then
        mkdir -p "$initdir"/etc/storagetm
        grep '^PRETTY_NAME=' "$dracutsysrootdir"/etc/os-release > "$initdir"/etc/storagetm/os-release
    fi

    # networkd, not enabled: only the target wants it.
    inst_multiple -o \
        "$systemdnetwork"/99-default.link \
        "$systemdsystemunitdir"/modprobe@.service \
        "$systemdsystemunitdir"/sys-kernel-config.mount \
        "$systemdsystemunitdir"/systemd-network-generator.service \
        "$systemdsystemunitdir"/systemd-networkd.service \
        "$systemdsystemunitdir"/systemd-networkd.socket \
        "$systemdutildir"/networkd.conf \
        "$systemdutildir"/systemd-network-generator \
        "$systemdutildir"/systemd-networkd \
        "$tmpfilesdir"/systemd-network.conf \
        modprobe mount
    if ! grep -q '^systemd-network:' "$initdir"/etc/passwd; then
        grep '^systemd-network:' /etc/passwd >> "$initdir"/etc/passwd
        grep '^systemd-network:' /etc/group >> "$initdir"/etc/group
    fi
    inst_simple "$moddir"/zzzz-storagetm.network "$systemdnetwork"/zzzz-storagetm.network
    if ! grep -q link-local "$systemdutildir"/systemd-network-generator; then
        # Before systemd 254 it gives up on "ip=link-local", and on the rest of the command line with it.
        inst_simple "$moddir"/70-storagetm-link-local.network "$systemdnetwork"/70-storagetm-link-local.network
        inst_simple "$moddir"/network-generator.conf \
            "$systemdsystemunitdir"/systemd-network-generator.service.d/storagetm.conf
    fi

    # Where systemd has it: the service that extends a register of the TPM. Which libraries it needs it only finds out
    # when it runs, and without them it does nothing and does not fail.
    if [[ -e $systemdsystemunitdir/systemd-pcrphase-storage-target-mode.service ]]; then
        inst_multiple -o \
            "$systemdsystemunitdir"/systemd-pcrphase-storage-target-mode.service \
            "$systemdsystemunitdir"/tpm2.target \
            "$systemdutildir"/systemd-pcrextend
        inst_libdir_file "libcrypto.so.*" "libtss2-esys.so.*" "libtss2-mu.so.*" "libtss2-rc.so.*" "libtss2-sys.so.*" \
            "libtss2-tcti-device.so.*"
        inst_simple "$moddir"/pcrphase.conf \
            "$systemdsystemunitdir"/systemd-pcrphase-storage-target-mode.service.d/storagetm.conf
    fi

    # On a bare cable nobody answers DHCP.
    inst_simple "$moddir"/dhcp-link-local /usr/lib/storagetm/dhcp-link-local
    inst_simple "$moddir"/dhcp-link-local.conf \
        "$systemdsystemunitdir"/systemd-network-generator.service.d/storagetm-dhcp.conf

    # What says who a disk is, and names the network interfaces.
    inst_rules 60-block.rules 60-cdrom_id.rules 60-persistent-storage.rules 75-net-description.rules \
        80-net-setup-link.rules 99-systemd.rules
    inst_multiple -o "$udevdir"/ata_id "$udevdir"/cdrom_id "$udevdir"/scsi_id
    # dracut does not look in /usr/local.
    for rules in /usr/local/lib/udev "$udevdir"; do
        if [[ -e $rules/rules.d/54-storagetm.rules ]]; then
            inst_simple "$rules"/rules.d/54-storagetm.rules "$udevdir"/rules.d/54-storagetm.rules
            break
        fi
    done

    # The names under which disks are exported are made from the machine ID. dracut's systemd module puts it into an
    # image for this host; in a generic one systemd makes it up at each boot, except on virtual machines whose firmware
    # has a UUID, and unless systemd.machine_id= or a credential sets it.

    # For encrypted connections, where there is what opens them, unless dracut's configuration has storagetm_tls=no.
    if [[ ${storagetm_tls-yes} == yes && -e $dracutsysrootdir/usr/sbin/tlshd ]]; then
        inst_multiple "$unit_dir"/storagetm-tlshd.service /usr/sbin/tlshd
        inst_multiple "$(sed -n 's/^ExecStart=.* //p' "$unit_dir"/storagetm-tlshd.service)"
    fi

    if [[ $hostonly ]]; then
        for unit in storage-target-mode.target storagetm.service storagetm-failure.service storagetm-tlshd.service; do
            inst_multiple -H -o "/etc/systemd/system/$unit.d/*.conf"
        done
    fi
}
