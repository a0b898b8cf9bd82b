# SPDX-License-Identifier: Apache-2.0

# memctl's own parts and the host's knowledge of QEMU.
file(GLOB UNIT_CTL_SOURCES CONFIGURE_DEPENDS ctl_*.c)
set(CTL_DIR ${PROJECT_SOURCE_DIR}/memd/ctl)
add_executable(unit_ctl ${UNIT_CTL_SOURCES} scripted_qemu.c ${CTL_DIR}/analyze_compress.c
               ${CTL_DIR}/analyze_count.c ${CTL_DIR}/analyze_elf.c ${CTL_DIR}/analyze_guest.c
               ${CTL_DIR}/analyze_source.c ${CTL_DIR}/image.c
               ${CTL_DIR}/needed.c ${CTL_DIR}/output.c ${CTL_DIR}/value.c)
target_include_directories(unit_ctl PRIVATE ${CTL_DIR})
target_compile_definitions(unit_ctl PRIVATE MEMD_PRELOAD_INSTALLED="/nowhere/libmemd-preload.so"
                           MEMD_PRELOAD_FROM_BIN="../nowhere/libmemd-preload.so")
# Criterion declares its tests' functions nowhere.
target_compile_options(unit_ctl PRIVATE -Wno-missing-prototypes)
target_link_libraries(unit_ctl PRIVATE memd_common memd_qemu PkgConfig::CRITERION PkgConfig::JANSSON
                      PkgConfig::LZ4)
if(TARGET memvm)
    target_compile_definitions(unit_ctl PRIVATE MEMVM_PATH="$<TARGET_FILE:memvm>")
    add_dependencies(unit_ctl memvm)
endif()
add_test(NAME unit_ctl COMMAND unit_ctl)
