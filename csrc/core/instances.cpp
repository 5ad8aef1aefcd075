#include "core/instances.hpp"

#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(_WIN32)
#include "core/windows.hpp"

#include <psapi.h>
#else
#include <dlfcn.h>
#if defined(__APPLE__)
#include <mach-o/dyld.h>
#else
#include <link.h>
#endif
#endif

// By this name a copy knows another.
extern "C" const void* inferos_instance() {
  static const char here = 0;
  return &here;
}

namespace inferos {
namespace {

constexpr const char* kMark = "inferos_instance";

struct Copy {
  const void* base;  // where it is mapped
  std::string file;
};

#if defined(_WIN32)

Copy describe(HMODULE module) {
  char file[MAX_PATH] = {};
  GetModuleFileNameA(module, file, MAX_PATH);
  return {module, file};
}

Copy self() {
  HMODULE module = nullptr;
  GetModuleHandleExA(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT,
                     reinterpret_cast<const char*>(&self), &module);
  return describe(module);
}

std::vector<Copy> copies() {
  DWORD bytes = 0;
  const HANDLE process = GetCurrentProcess();
  if (!K32EnumProcessModules(process, nullptr, 0, &bytes)) return {};
  std::vector<HMODULE> modules(bytes / sizeof(HMODULE));
  if (!K32EnumProcessModules(process, modules.data(), bytes, &bytes)) return {};
  modules.resize(std::min(modules.size(), static_cast<std::size_t>(bytes / sizeof(HMODULE))));
  std::vector<Copy> found;
  for (HMODULE module : modules) {
    if (GetProcAddress(module, kMark)) found.push_back(describe(module));
  }
  return found;
}

#else

Copy describe(const void* address) {
  Dl_info info{};
  if (dladdr(address, &info) == 0) return {nullptr, {}};
  return {info.dli_fbase, info.dli_fname ? info.dli_fname : ""};
}

Copy self() { return describe(reinterpret_cast<const void*>(&self)); }

// Files of the process' modules, in the order in which they were loaded.
std::vector<std::string> modules() {
  std::vector<std::string> files;
#if defined(__APPLE__)
  for (std::uint32_t i = 0; i < _dyld_image_count(); ++i) {
    if (const char* file = _dyld_get_image_name(i)) files.emplace_back(file);
  }
#else
  // Nothing is opened in here: the walk holds the loader's lock.
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* to) {
        if (info->dlpi_name && *info->dlpi_name)
          static_cast<std::vector<std::string>*>(to)->emplace_back(info->dlpi_name);
        return 0;
      },
      &files);
#endif
  return files;
}

std::vector<Copy> copies() {
  std::vector<Copy> found;
  for (const std::string& file : modules()) {
    void* module = dlopen(file.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (!module) continue;
    const void* mark = dlsym(module, kMark);  // also where the module only links to a copy
    const Copy copy = mark ? describe(mark) : Copy{};
    dlclose(module);
    const auto same = [&](const Copy& known) { return known.base == copy.base; };
    if (mark && std::none_of(found.begin(), found.end(), same)) found.push_back(copy);
  }
  return found;
}

#endif

}  // namespace

std::string own_file() { return self().file; }

std::string earlier_copy() {
  const std::vector<Copy> loaded = copies();
  return loaded.empty() || loaded.front().base == self().base ? std::string{} : loaded.front().file;
}

}  // namespace inferos
