// What the README's program uses of Unity, so that a compiler can check the program. Nothing here runs.
namespace UnityEngine
{
    public enum TextureFormat { RGBA32 = 4 }

    public class Texture { }

    public class Texture2D : Texture
    {
        public Texture2D(int width, int height, TextureFormat textureFormat, bool mipChain) { }
        public void LoadRawTextureData(byte[] data) { }
        public void Apply() { }
    }

    public class Material { public Texture mainTexture { get; set; } }

    public class Renderer { public Material material { get; } }

    public class MonoBehaviour { public T GetComponent<T>() => default(T); }
}
